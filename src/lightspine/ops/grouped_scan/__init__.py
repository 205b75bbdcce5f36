"""The one recurrence behind both scans, for K groups of channels, channels innermost."""
