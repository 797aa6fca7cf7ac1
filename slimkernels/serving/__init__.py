"""HTTP clients of a served model, and the detection of the kind of server."""
