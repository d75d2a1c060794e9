"""IDP: documents to JSON."""
