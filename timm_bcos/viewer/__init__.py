"""One explanation as a static HTML page that needs no server."""
