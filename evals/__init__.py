"""How vtprune is measured: accuracy, speed, parity with official codes, and the toy models that it is tried on."""
