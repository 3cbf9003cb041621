"""The converted checkpoint on disk: its format, the reader that trusts nothing, the loader, the sizes it states."""
