"""The API of OpenAI, and some of llama-server's.

fields.py        the fields of a request, and how they become the arguments of GENERATE
generation.py    from these arguments to the reply: whole, or in parts
named.py         which field of a chat or completion an error is about
tokens.py        /tokenize and /detokenize
chat.py completions.py embeddings.py listing.py responses.py kept.py     the forms of the replies, one file for a family
"""
