"""The bundled teachers and data set of the quickstart, what made them, and the tables about them."""
