"""The zoo's layers, one file each, which registers its methods itself."""
