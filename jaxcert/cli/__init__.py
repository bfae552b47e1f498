"""The command line: one instance or a whole benchmark of VNN-COMP, decided and recorded."""
