"""Write sweeps as web pages."""
