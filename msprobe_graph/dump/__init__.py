"""The one dump schema: names, records, writer, reader. Imports no capture code."""
