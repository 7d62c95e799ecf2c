"""`vlmo report`: one page about one or more runs, to look at."""
