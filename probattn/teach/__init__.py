"""Teaching: the explorer in the browser, and exercises with checks."""
