"""`cvlctl evaluate`: episodes of policies, rows of results, tables and pictures of them."""
