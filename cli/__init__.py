"""The command lines: parse, call, print.  The only place that knows click and rich."""
