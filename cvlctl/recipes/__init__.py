"""Recipe files: YAML with line numbers, shared values, matrix, and errors in words. It knows no step."""
