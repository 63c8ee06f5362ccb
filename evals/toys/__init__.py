"""Two tiny models that are really trained: one looks at pictures (`image`), one watches clips (`video`)."""
