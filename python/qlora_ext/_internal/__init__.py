"""Internal helpers shared by the subpackages. Modules here import no others of the package, only each other."""
