"""``qlora-ext serve``: an application with OpenAI's HTTP interface over a decoder of many sequences.

``requests`` checks what a client sends; ``loop`` runs the decoder in a thread; ``text`` turns tokens into text, up to a
stop string; ``tools`` finds calls in it; ``grammar`` limits it to JSON; ``answers`` collects the answers to a request;
``replies`` builds the bodies; ``application`` has the routes; ``server`` listens; ``connections`` has the deadlines.
"""
