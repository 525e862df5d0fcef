"""The API of OpenAI, and what llama-server has besides.

fields.py        what may stand in a request, and what it becomes: the arguments of GENERATE
generation.py    from those to the reply: whole, or in parts
named.py         which field an error is about
tokens.py        /tokenize and /detokenize
named.py         how chats and completions name what the arguments are made from
chat.py completions.py embeddings.py listing.py responses.py kept.py     the forms of the replies, one file for a family
"""
