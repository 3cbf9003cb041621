"""Serve a converted Covo-Audio-Chat over HTTP and WebSocket, with a page to talk to it."""
