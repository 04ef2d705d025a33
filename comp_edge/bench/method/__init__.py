"""`comp-edge bench method`: strategies against each other at equal steps, over reductions and seeds, cell by cell."""
