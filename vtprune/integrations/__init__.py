"""vtprune inside other programmes, each found by its own entry point and imported only by that programme."""
