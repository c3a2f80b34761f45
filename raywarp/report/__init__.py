"""The report page of a run or a sweep: its data, read from files, and its one HTML file."""
