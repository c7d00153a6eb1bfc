"""Layers by faster routes."""
