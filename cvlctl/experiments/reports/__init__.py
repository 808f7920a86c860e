"""`cvlctl report`: what came of an experiment, as one page to send around, and its figures and tables as files."""
