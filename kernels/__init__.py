"""Tensor operations with one signature and several implementations; nothing of vtprune is imported here."""
