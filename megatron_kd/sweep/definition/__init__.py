"""Read sweep files and resolve them to the tasks of a grid."""
