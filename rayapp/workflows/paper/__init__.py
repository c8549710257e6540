"""``rayapp reproduce``: searches, plans and measurements behind a paper's tables, row by row."""
