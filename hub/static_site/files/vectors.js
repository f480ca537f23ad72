// The vectors of the collection in int8, and searches among them by integer dot products. An image and its captions are
// one thing, whose best match counts, as in `bifocal search`.

const LEVELS = 2047; // of a query's numbers: a sum of products stays below 2^31 up to 8,192 dimensions
const GROUPS = { image: 0, text: 1, caption: 2, captionAndText: 3 }; // of a row
const HIGHEST = 0.999; // of a caption among images: an image that is the query itself comes first

export class Vectors {
  /**
   * @param site content of data/site.json
   * @param groups group of each row, a byte each
   * @param captions pairs of a caption's row and the row of an image that it belongs to
   * @param parts bytes of the int8 vectors, part by part
   */
  constructor(site, groups, captions, parts) {
    this.dimensions = site.dimensions;
    this.groups = groups;
    this.samples = site.samples;
    this.images = new Map(); // by row of the caption
    for (let i = 0; i < captions.length; i += 2) {
      const images = this.images.get(captions[i]) ?? [];
      images.push(captions[i + 1]);
      this.images.set(captions[i], images);
    }
    this.parts = parts.map(({ buffer }, number) => {
      return { first: site.vectors[number].first_row, values: new Int8Array(buffer) };
    });
    this.lengths = new Float32Array(groups.length);
    for (const { first, values } of this.parts) {
      for (let row = first, start = 0; start < values.length; row++, start += this.dimensions) {
        let sum = 0;
        for (let i = start; i < start + this.dimensions; i++) sum += values[i] * values[i];
        this.lengths[row] = Math.max(Math.sqrt(sum), 1e-12);
      }
    }
  }

  kind(row) {
    return this.groups[row] === GROUPS.image ? "image" : "text";
  }

  /** Return the unit vector of a row. */
  unit(row) {
    const part = this.parts.findLast(({ first }) => first <= row);
    const start = (row - part.first) * this.dimensions;
    const values = part.values.subarray(start, start + this.dimensions);
    return Float32Array.from(values, (value) => value / this.lengths[row]);
  }

  /** Return the cosine of each row to a unit vector. */
  scores(query) {
    const largest = query.reduce((most, value) => Math.max(most, Math.abs(value)), 1e-12);
    const levels = Int32Array.from(query, (value) => Math.round((value / largest) * LEVELS));
    const scores = new Float32Array(this.groups.length);
    const factor = largest / LEVELS;
    for (const { first, values } of this.parts) {
      const count = values.length / this.dimensions;
      for (let row = 0, position = 0; row < count; row++) {
        let sum = 0;
        for (let i = 0; i < levels.length; i++, position++) sum = (sum + Math.imul(levels[i], values[position])) | 0;
        scores[first + row] = (sum * factor) / this.lengths[first + row];
      }
    }
    return scores;
  }

  /**
   * Return the k best things of each ranking, a list of kinds: row of the thing, row that matched, and its score.
   * @param without row of a thing that is no hit
   */
  rank(query, rankings, k, without = null) {
    const scores = this.scores(query);
    return rankings.map((kinds) => this.rankThings(scores, kinds, k, without));
  }

  rankThings(scores, kinds, k, without) {
    const [ofImages, ofTexts] = ["image", "text"].map((kind) => kinds.includes(kind));
    const scale = this.scales(scores, kinds);
    const best = new Float64Array(scores.length).fill(-Infinity); // by thing
    const matched = new Int32Array(scores.length); // row by which a thing is found
    const offer = (thing, row, value) => {
      if (value < best[thing] || (value === best[thing] && scores[row] <= scores[matched[thing]])) return;
      best[thing] = value;
      matched[thing] = row;
    };
    for (let row = 0; row < scores.length; row++) {
      const group = this.groups[row];
      if (group === GROUPS.image) {
        if (ofImages) offer(row, row, scale.image(scores[row]));
        continue;
      }
      const value = scale.text(scores[row]);
      if (ofImages && group !== GROUPS.text) for (const image of this.images.get(row)) offer(image, row, value);
      if (ofTexts && group !== GROUPS.caption) offer(row, row, value);
    }
    // Images that share a caption are ordered by their own scores, and come before the caption as a text of its own.
    const order = (one, other) =>
      best[other] - best[one] || scores[matched[other]] - scores[matched[one]] || matched[one] - matched[other] ||
      (one === matched[one]) - (other === matched[other]) || scores[other] - scores[one] || one - other;
    const things = []; // ordered, at most k
    for (let thing = 0; thing < scores.length; thing++) {
      if (best[thing] === -Infinity || thing === without) continue;
      if (things.length === k && order(things[k - 1], thing) <= 0) continue;
      let position = things.length;
      while (position > 0 && order(things[position - 1], thing) > 0) position--;
      things.splice(position, 0, thing);
      if (things.length > k) things.pop();
    }
    return things.map((row) => ({ row, matched: matched[row], score: scores[matched[row]] }));
  }

  /**
   * Return what scores of images and of texts count in a ranking of some kinds. Among both, a score counts by its
   * distance from the mean score of its kind, in standard deviations, since texts are more similar to texts than to
   * images. Among images, a caption's counts as the score of an image that is as far from the mean.
   */
  scales(scores, kinds) {
    const same = (score) => score;
    if (!this.samples.image || !this.samples.text || !kinds.includes("image")) return { image: same, text: same };
    const [image, text] = [this.samples.image, this.samples.text].map((rows) => meanAndDeviation(rows, scores));
    const distance = ([mean, deviation]) => (score) => (score - mean) / deviation;
    if (kinds.length > 1) return { image: distance(image), text: distance(text) };
    return { image: same, text: (score) => Math.min(image[0] + image[1] * distance(text)(score), HIGHEST) };
  }
}

function meanAndDeviation(rows, scores) {
  const mean = rows.reduce((sum, row) => sum + scores[row], 0) / rows.length;
  const variance = rows.reduce((sum, row) => sum + (scores[row] - mean) ** 2, 0) / rows.length;
  return [mean, Math.max(Math.sqrt(variance), 1e-6)];
}
