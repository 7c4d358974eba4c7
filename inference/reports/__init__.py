"""Pages for people: the report of `verify` and the page of `support`."""
