"""The stages. They talk through files only, and none imports another."""
