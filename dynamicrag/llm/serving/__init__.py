"""The server of a selector: requests of clients, slots, replies in the forms of Jina, Cohere and OpenAI, the page."""
