"""The server for programs: `bifocal serve --api`.

It answers as OpenAI's and Jina's embedding services do (`/v1/embeddings`), searches an index if it has one
(`/v1/search`), and shares one model with the search page. It lies above `hub.search`, and only the command line imports
it.

- `settings`: what a server allows; imports nothing heavy.
- `errors`, `schemas`, `inputs`: errors and bodies of requests, and what the bodies hold.
- `body`, `fetch`, `admission`: what protects the server: sizes and times of bodies, addresses of images, the queue.
- `service`: embeds and searches in worker threads; `tokens` counts tokens, `metrics` counts all.
- `gate`, `answer`: what all requests pass, and how answers are sent.
- `app`, `documentation`: the routes and their page; `server`: listens, and stops without dropping what it has begun.
"""
