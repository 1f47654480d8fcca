"""What several rooms of the package use and no user calls. Modules here import nothing of ours but each other."""
