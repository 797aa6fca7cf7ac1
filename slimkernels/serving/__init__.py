"""The HTTP side of a served model: clients, and which kind of server is answering."""
