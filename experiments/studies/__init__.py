"""Studies: several trainings compared, each one command."""
