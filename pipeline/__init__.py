"""The orchestration: reads conf/, calls ddpm/, writes runs/. See the map of the modules in README.md."""
