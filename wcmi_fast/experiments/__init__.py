"""Ready experiments with their tables, figures and reports."""
