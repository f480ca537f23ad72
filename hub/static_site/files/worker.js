// Loads the model and the vectors of this site and searches, in a worker, so that the page stays responsive.
import { Vectors } from "./vectors.js";

const BASE = new URL(".", import.meta.url);
const MAX_CHARACTERS = 20000; // tokenizing a book takes minutes

/** What is wrong, in words for visitors. */
class SiteError extends Error {}

let site; // content of data/site.json
let vectors;
let model; // of texts: { transformers, tokenizer, tower }
let imageModel; // of images, loaded with the first uploaded image: { processor, tower, pixels }
let fileProblem; // of a file of the model
const loaded = new Map(); // bytes by file, while files are loaded at the start

/** Return the bytes of a file, checked by its size and its hash if they are known. */
async function fetchBytes(path, expected = site?.files[path]) {
  const remedy = "Load the page again, or upload the site again.";
  const problem = (reason) => new SiteError(`'${path}' of this site ${reason}. ${remedy}`);
  let response, bytes;
  try {
    response = await fetch(new URL(path, BASE));
    if (!response.ok) throw problem(`cannot be loaded (status ${response.status})`);
    bytes = await readBody(response, path);
  } catch (error) {
    throw error instanceof SiteError ? error : problem("cannot be loaded (no answer)");
  }
  if (expected === undefined) return bytes;
  if (bytes.byteLength !== expected.bytes) {
    throw problem(`has ${bytes.byteLength} bytes instead of ${expected.bytes}`);
  }
  // Browsers only hash on https and on this machine.
  if (expected.sha256 !== undefined && globalThis.crypto?.subtle) {
    const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
    const hex = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
    if (hex !== expected.sha256) throw problem("is damaged: it has another content than the one that was written");
  }
  return bytes;
}

async function readBody(response, path) {
  const parts = [];
  let length = 0;
  const reader = response.body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    parts.push(part.value);
    length += part.value.byteLength;
    loaded.set(path, length);
    report();
  }
  const bytes = new Uint8Array(length);
  let start = 0;
  for (const part of parts) {
    bytes.set(part, start);
    start += part.byteLength;
  }
  return bytes;
}

let reported = 0;

/** Tell the page how much is loaded, ten times a second at most. */
function report() {
  if (site === undefined || performance.now() - reported < 100) return;
  reported = performance.now();
  const first = Object.keys(site.files).filter((path) => site.files[path].first);
  const total = first.reduce((sum, path) => sum + site.files[path].bytes, 0);
  const done = first.reduce((sum, path) => sum + (loaded.get(path) ?? 0), 0);
  postMessage({ loaded: done, total });
}

async function fetchSite() {
  const text = new TextDecoder().decode(await fetchBytes("data/site.json"));
  try {
    site = JSON.parse(text);
  } catch {
    throw new SiteError("'data/site.json' of this site is damaged. Upload the site again.");
  }
}

async function loadVectors() {
  const files = ["data/groups.dat", "data/captions.dat", ...site.vectors.map(({ file }) => file)];
  const [groups, captions, ...parts] = await Promise.all(files.map((file) => fetchBytes(file)));
  vectors = new Vectors(site, groups, new Int32Array(captions.buffer), parts);
}

async function loadLibrary() {
  let transformers;
  try {
    transformers = await import("./lib/transformers.web.min.js");
  } catch (error) {
    throw new SiteError(`A script of this site cannot be loaded (${error.message}). Upload the site again.`);
  }
  const { env } = transformers;
  env.allowRemoteModels = false;
  env.allowLocalModels = true;
  env.localModelPath = BASE.pathname; // it asks for files by this path
  env.useBrowserCache = false; // the browser's own cache does it
  env.useWasmCache = false;
  env.logLevel = transformers.LogLevel.ERROR;
  env.fetch = async (url) => {
    const path = decodeURI(new URL(url, BASE).href.slice(BASE.href.length));
    if (!(path in site.files)) return new Response(null, { status: 404 }); // optional files
    try {
      return new Response(await fetchBytes(path));
    } catch (error) {
      fileProblem = error; // transformers.js only says that a file was not found
      throw error;
    }
  };
  const wasm = env.backends.onnx.wasm;
  wasm.numThreads = 1; // threads need headers that static hosts do not send
  wasm.wasmPaths = { wasm: new URL("lib/ort-wasm-simd-threaded.wasm", BASE).href };
  wasm.wasmBinary = await fetchBytes("lib/ort-wasm-simd-threaded.wasm");
  return transformers;
}

const OPTIONS = { dtype: "int8", device: "wasm" };

async function loadModel() {
  const transformers = await loadLibrary();
  const [tokenizer, tower] = await Promise.all([
    transformers.AutoTokenizer.from_pretrained("model"),
    transformers.CLIPTextModelWithProjection.from_pretrained("model", OPTIONS),
  ]);
  model = { transformers, tokenizer, tower };
}

/** Load what embeds images; the page asks for it only with the first uploaded image. */
async function loadImageModel() {
  const { transformers } = model;
  const [processor, tower, pixels] = await Promise.all([
    transformers.AutoProcessor.from_pretrained("model"),
    transformers.CLIPVisionModelWithProjection.from_pretrained("model", OPTIONS),
    import("./images.js"),
  ]);
  return { processor, tower, pixels };
}

/** Return the token ids of a text, and whether it was cut. Special tokens at its end are kept, as Python does. */
function tokenIds(text) {
  const { tokenizer } = model;
  const ids = (special) => tokenizer(text, { return_tensor: false, add_special_tokens: special }).input_ids;
  const all = ids(true);
  if (all.length <= site.max_tokens) return [all, false];
  const plain = ids(false);
  let before = 0; // special tokens in front
  while (before < all.length - plain.length && plain.some((id, i) => all[before + i] !== id)) before++;
  const end = all.slice(before + plain.length);
  return [[...all.slice(0, site.max_tokens - end.length), ...end], true];
}

async function embedText(text) {
  const { Tensor } = model.transformers;
  const [ids, cut] = tokenIds(site.prompt + text.slice(0, MAX_CHARACTERS));
  const tensor = (values) => new Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  const { text_embeds } = await model.tower({ input_ids: tensor(ids), attention_mask: tensor(ids.map(() => 1)) });
  return [normalize(text_embeds.data), cut || text.length > MAX_CHARACTERS];
}

async function embedImage(blob) {
  imageModel ??= loadImageModel();
  const { processor, tower, pixels } = await imageModel.catch((error) => {
    const problem = fileProblem ?? error;
    imageModel = fileProblem = undefined; // so that another try may succeed
    throw problem;
  });
  let image;
  try {
    image = await pixels.decode(blob, model.transformers.RawImage);
  } catch (error) {
    throw new SiteError(`The image cannot be used: ${error.message}. Choose another one.`);
  }
  const { pixel_values } = await processor(image);
  return normalize((await tower({ pixel_values })).image_embeds.data);
}

function normalize(vector) {
  let sum = 0;
  for (const value of vector) sum += value * value;
  const length = Math.max(Math.sqrt(sum), 1e-12);
  return Float32Array.from(vector, (value) => value / length);
}

/** Return the unit vector of a query by text, by image (uploaded, or a row of the collection) or between the two. */
async function queryVector({ text, row, image, weight }) {
  const weighted = [];
  let cut = false;
  const byImage = image != null ? await embedImage(image) : row != null ? vectors.unit(row) : null;
  const both = Boolean(text) && byImage !== null;
  if (byImage !== null) weighted.push([both ? 1 - weight : 1, byImage]);
  if (text) {
    const [vector, wasCut] = await embedText(text);
    cut = wasCut;
    weighted.push([both ? weight : 1, vector]);
  }
  const sum = new Float32Array(site.dimensions);
  for (const [factor, vector] of weighted) for (let i = 0; i < sum.length; i++) sum[i] += factor * vector[i];
  return [normalize(sum), cut];
}

const packs = new Map(); // promises of the files of items that were shown, the latest last
const MAX_PACKS = 64;

function fetchPack(number) {
  const name = `data/items/${String(number).padStart(6, "0")}.dat`;
  const pack = packs.get(number) ?? fetchBytes(name, { bytes: site.items.bytes[number] });
  packs.delete(number);
  packs.set(number, pack);
  pack.catch(() => packs.delete(number));
  if (packs.size > MAX_PACKS) packs.delete(packs.keys().next().value);
  return pack;
}

/** Return what is shown of a row: name, names, text and thumbnail. */
async function readItem(row) {
  const starts = site.items.first_rows;
  let [low, high] = [0, starts.length];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (starts[middle] <= row) low = middle;
    else high = middle;
  }
  const bytes = await fetchPack(low);
  const view = new DataView(bytes.buffer);
  const length = view.getUint32(0, true);
  const entries = JSON.parse(new TextDecoder().decode(bytes.subarray(4, 4 + length)));
  const { thumbnail, ...item } = entries[row - starts[low]];
  const start = 4 + length + (thumbnail?.start ?? 0);
  return { ...item, kind: vectors.kind(row), thumbnail: thumbnail && bytes.slice(start, start + thumbnail.bytes) };
}

/** Return a hit with what is shown of it, and with the caption that matched if one did. */
async function readHit({ row, matched, score }) {
  const [item, caption] = await Promise.all([readItem(row), matched === row ? null : readItem(matched)]);
  return { ...item, row, score, caption: caption && caption.text };
}

async function search(query) {
  const start = performance.now();
  const [vector, cut] = await queryVector(query);
  const embedded = performance.now();
  // What others are searched like is no hit of its own.
  const rankings = vectors.rank(vector, query.rankings, query.k, query.row);
  const ranked = performance.now();
  const hits = await Promise.all(
    rankings.map((ranking) => Promise.all(ranking.map(readHit))),
  );
  return { vector, cut, rankings: hits, milliseconds: { embed: embedded - start, rank: ranked - embedded } };
}

addEventListener("message", async ({ data: { id, query } }) => {
  try {
    postMessage({ id, result: await search(query) });
  } catch (error) {
    postMessage({ id, error: sentence(error) });
  }
});

function sentence(error) {
  const known = error instanceof SiteError ? error : fileProblem;
  if (known !== undefined) return known.message;
  console.error(error);
  return `This search does not work in this browser (${error?.message ?? error}).`;
}

const started = (async () => {
  await fetchSite();
  await Promise.all([loadVectors(), loadModel()]);
})();
started.then(
  () => postMessage({ ready: true }),
  (error) => postMessage({ failed: sentence(error) }),
);
