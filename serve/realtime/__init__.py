"""OpenAI's realtime interface: a dialogue over a websocket, by turns of the client's or of voice activity detection."""
