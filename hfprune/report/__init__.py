"""What a run found, for people: tables, pictures and the environment. Reads the report, never a model."""
