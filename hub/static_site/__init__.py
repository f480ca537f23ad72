"""A search site without a server: plain files for any static host, in which the browser embeds and searches.

- `arguments`: checks what `bifocal serve --static` is asked for.
- `npm`: onnxruntime-web and transformers.js, from npm's registry by pinned hashes.
- `towers`: the model's int8 ONNX towers with tokenizer and configuration, compared with torch.
- `collection`: vectors in int8, and files of texts and thumbnails.
- `site`: writes all of it with the page, whole or not at all.
- `files/`: the page's HTML, styles and scripts: `page.js` shows, `worker.js` loads and embeds, `vectors.js` ranks and
  `images.js` prepares a visitor's image.

A room of its own on top of `hub` (whose ONNX export it uses) and `hub.search` (whose index and look it uses).
"""
