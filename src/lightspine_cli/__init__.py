"""The command line, apart from the library: `lightspine --help` answers without importing torch."""
