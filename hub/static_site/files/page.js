// The page of a static site: it shows what the worker finds. Everything from the collection is text, never HTML.
"use strict";

const MAX_UPLOAD = 10 * 2 ** 20; // bytes
const HEADINGS = { image: "Images", text: "Texts" };
const VIEWS = {
  "One ranking": [["image", "text"]],
  "Two rankings": [["image"], ["text"]],
  "Images only": [["image"]],
  "Texts only": [["text"]],
};

/** Searches in a worker. */
class SearchClient {
  constructor({ progress, failed } = {}) {
    const address = JSON.stringify(new URL("worker.js", document.baseURI).href);
    // A worker from a blob keeps the page's policy of loading nothing from other hosts; one from an address would not.
    const source = `import(${address}).catch(() => postMessage({ failed: "" }));`;
    this.worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })), { type: "module" });
    this.waiting = new Map();
    this.lastId = 0;
    const broken = "A script of this site cannot be loaded (worker.js or vectors.js). Upload the site again.";
    this.ready = new Promise((resolve, reject) => {
      this.worker.onmessage = ({ data }) => {
        if (data.id !== undefined) this.answer(data);
        else if (data.loaded !== undefined) progress?.(data.loaded, data.total);
        else if (data.ready) resolve();
        else if (data.failed !== undefined) reject(new Error(data.failed || broken));
      };
      this.worker.onerror = () => reject(new Error(broken));
    });
    this.ready.catch((error) => failed?.(error.message));
  }

  answer({ id, result, error }) {
    const { resolve, reject } = this.waiting.get(id);
    this.waiting.delete(id);
    if (error === undefined) resolve(result);
    else reject(new Error(error));
  }

  /**
   * Search by a text, an image (a row of the collection, or an uploaded file), or by what is between the two.
   * @param query { text, row, image, weight, k, rankings: a list of kinds for each ranking }
   * @returns { vector, cut, rankings, milliseconds }
   */
  async search(query) {
    await this.ready;
    return new Promise((resolve, reject) => {
      const id = ++this.lastId;
      this.waiting.set(id, { resolve, reject });
      this.worker.postMessage({ id, query });
    });
  }
}

const byId = (id) => document.getElementById(id);
const results = byId("bf-results");
let example = null; // what is searched by beside the text: { row, name, url } or { image, name, url }
let resultUrls = [];
let lastSearch = 0;

function element(tag, { className, text, children = [], ...properties } = {}) {
  const made = Object.assign(document.createElement(tag), properties);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  made.append(...children.filter(Boolean));
  return made;
}

function note(text, role = "status") {
  const shown = element("div", { className: "bf-note", text });
  shown.setAttribute("role", role);
  return shown;
}

function imageUrl(bytes) {
  const type = bytes[0] === 0x89 ? "image/png" : "image/jpeg";
  return URL.createObjectURL(new Blob([bytes], { type }));
}

const baseName = (name) => name.slice(name.lastIndexOf("/") + 1);

function hitElement(hit, rank) {
  const text = element("p", { text: hit.text });
  const others = hit.others ? ` and ${hit.others} more` : "";
  const name = baseName(hit.name);
  const score = element("span", {
    className: "bf-score",
    children: [element("span", { text: `${rank}. ${hit.kind}` }), element("span", { text: hit.score.toFixed(3) })],
  });
  const bar = element("progress", { className: "bf-bar", max: 1, value: Math.min(Math.max(hit.score, 0), 1) });
  bar.setAttribute("aria-hidden", "true");
  const more = element("button", { className: "bf-more", type: "button", text: "More like this" });
  more.setAttribute("aria-label", `More like ${name}`);
  more.addEventListener("click", () => moreLikeThis(hit));
  let frame = null;
  if (hit.thumbnail) {
    const url = imageUrl(hit.thumbnail);
    resultUrls.push(url);
    frame = element("span", { className: "bf-frame", children: [element("img", { src: url, alt: hit.text || name })] });
  }
  let matched = null;
  if (hit.caption !== null) {
    const which = hit.caption === hit.text ? "" : `: ${hit.caption}`;
    matched = element("p", { className: "bf-matched", text: `Matched its caption${which}` });
  }
  const names = [hit.name, ...hit.other_names].join("\n");
  const caption = name !== hit.text || others ? element("small", { text: name + others, title: names }) : null;
  return element("li", {
    className: `bf-hit bf-${hit.kind}`,
    tabIndex: 0,
    children: [frame, text, matched, caption, more, score, bar],
  });
}

function show(...children) {
  resultUrls.forEach((url) => URL.revokeObjectURL(url));
  resultUrls = [];
  results.replaceChildren(...children);
}

function showRankings(view, { rankings, cut }) {
  show();
  const total = rankings.reduce((sum, hits) => sum + hits.length, 0);
  if (cut) results.append(note("The text is long: only its beginning was used."));
  const count = element("p", { text: `${total} hit${total === 1 ? "" : "s"}` });
  count.setAttribute("role", "status");
  results.append(count);
  rankings.forEach((hits, number) => {
    const kinds = VIEWS[view][number];
    if (rankings.length > 1) results.append(element("h2", { text: HEADINGS[kinds[0]] }));
    if (hits.length === 0) results.append(note("The index has none of this kind."));
    else {
      const cards = hits.map((hit, i) => hitElement(hit, i + 1));
      results.append(element("ol", { className: "bf-hits", children: cards }));
    }
  });
}

function setExample(next) {
  if (example !== null) URL.revokeObjectURL(example.url);
  example = next;
  const shown = [];
  if (next !== null) {
    if (next.url) shown.push(element("img", { src: next.url, alt: next.name }));
    shown.push(element("p", { text: next.text || next.name }));
  }
  byId("bf-query-image").replaceChildren(...shown);
  byId("bf-query-hint").hidden = next !== null;
  if (next?.image === undefined) byId("bf-upload").value = "";
}

function moreLikeThis(hit) {
  const url = hit.thumbnail ? imageUrl(hit.thumbnail) : "";
  setExample({ row: hit.row, name: baseName(hit.name), text: hit.text, url });
  byId("bf-text").value = "";
  document.querySelector(".bf-example").scrollIntoView({ block: "start" });
  search();
}

async function search() {
  if (client === null) return;
  const text = byId("bf-text").value.trim();
  if (!text && example === null) {
    show(note("Enter a text, or choose an image.", "alert"));
    return;
  }
  const view = document.querySelector("#bf-view input:checked").value;
  const number = ++lastSearch; // a later search replaces the answer of an earlier one
  results.setAttribute("aria-busy", "true");
  let answer;
  try {
    answer = await client.search({
      text,
      row: example?.row,
      image: example?.image,
      weight: byId("bf-weight").valueAsNumber,
      k: byId("bf-count").valueAsNumber,
      rankings: VIEWS[view],
    });
  } catch (error) {
    answer = error;
  }
  if (number !== lastSearch) return;
  results.removeAttribute("aria-busy");
  if (answer instanceof Error) show(note(answer.message, "alert"));
  else showRankings(view, answer);
}

function upload(file) {
  if (!file) return;
  if (file.size > MAX_UPLOAD) {
    byId("bf-upload").value = "";
    show(note(`The image is larger than ${MAX_UPLOAD / 2 ** 20} MiB. Choose a smaller one.`, "alert"));
    return;
  }
  setExample({ image: file, name: file.name, url: URL.createObjectURL(file) });
  search();
}

function clear() {
  lastSearch++;
  byId("bf-text").value = "";
  setExample(null);
  results.removeAttribute("aria-busy");
  show(note("Nothing searched yet."));
}

function showLoading(...children) {
  byId("bf-loading").replaceChildren(...children);
}

function start() {
  for (const id of ["bf-count", "bf-weight"]) {
    const update = () => (byId(`${id}-shown`).textContent = byId(id).value);
    byId(id).addEventListener("input", update);
    update();
  }
  byId("bf-form").addEventListener("submit", (event) => (event.preventDefault(), search()));
  byId("bf-clear").addEventListener("click", clear);
  byId("bf-upload").addEventListener("change", (event) => upload(event.target.files[0]));
  clear();
  if (location.protocol === "file:") {
    const remedy = "Run 'python -m http.server' in this folder and open http://localhost:8000.";
    showLoading(note(`Browsers load no model from a file. ${remedy}`, "alert"));
    return null;
  }
  const bar = element("progress", { max: 1, value: 0 });
  const words = element("span", { text: "Loading the model and the collection" });
  showLoading(element("label", { className: "bf-note", children: [words, bar] }));
  const client = new SearchClient({
    progress: (loaded, total) => {
      bar.value = loaded / total;
      words.textContent = `Loading the model and the collection: ${megabytes(loaded)} of ${megabytes(total)} MB`;
    },
    failed: (message) => showLoading(note(message, "alert")),
  });
  client.ready.then(() => showLoading(), () => {});
  return client;
}

const megabytes = (bytes) => (bytes / 1e6).toFixed(1);

const client = start();
