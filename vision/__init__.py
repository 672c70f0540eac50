"""Image towers and their embedding into the text model. Built by a later issue; text training does not need it."""
