// The vectors of the collection in int8, and searches among them by integer dot products.

const LEVELS = 2047; // of a query's numbers: a sum of products stays below 2^31 up to 8,192 dimensions
const KINDS = ["image", "text"];

export class Vectors {
  /**
   * @param site content of data/site.json
   * @param kinds number of the kind of each row, a byte each
   * @param parts bytes of the int8 vectors, part by part
   */
  constructor(site, kinds, parts) {
    this.dimensions = site.dimensions;
    this.kinds = kinds;
    this.samples = site.samples;
    this.parts = parts.map(({ buffer }, number) => ({ first: site.vectors[number].first_row, values: new Int8Array(buffer) }));
    this.lengths = new Float32Array(kinds.length);
    for (const { row, start, values } of this.rows()) {
      let sum = 0;
      for (let i = start; i < start + this.dimensions; i++) sum += values[i] * values[i];
      this.lengths[row] = Math.max(Math.sqrt(sum), 1e-12);
    }
  }

  *rows() {
    for (const { first, values } of this.parts) {
      const count = values.length / this.dimensions;
      for (let i = 0; i < count; i++) yield { row: first + i, start: i * this.dimensions, values };
    }
  }

  kind(row) {
    return KINDS[this.kinds[row]];
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
    const scores = new Float32Array(this.kinds.length);
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
   * Return the k best rows of each ranking, a list of kinds. A score among several kinds counts by its distance from the
   * mean score of its kind, in standard deviations, since texts are more similar to texts than to images.
   */
  rank(query, rankings, k, without = null) {
    const scores = this.scores(query);
    return rankings.map((kinds) => {
      const several = kinds.length > 1 && KINDS.every((kind) => this.samples[kind]);
      const usual = kinds.map((kind) => (several ? meanAndDeviation(this.samples[kind], scores) : [0, 1]));
      const best = []; // ordered, at most k
      for (let row = 0; row < scores.length; row++) {
        const number = kinds.indexOf(KINDS[this.kinds[row]]);
        if (number < 0 || row === without) continue;
        const [mean, deviation] = usual[number];
        const rankingScore = (scores[row] - mean) / deviation;
        if (best.length === k && rankingScore <= best[k - 1].rankingScore) continue;
        let place = best.length;
        while (place > 0 && best[place - 1].rankingScore < rankingScore) place--;
        best.splice(place, 0, { row, score: scores[row], rankingScore });
        if (best.length > k) best.pop();
      }
      return best;
    });
  }
}

function meanAndDeviation(rows, scores) {
  const mean = rows.reduce((sum, row) => sum + scores[row], 0) / rows.length;
  const variance = rows.reduce((sum, row) => sum + (scores[row] - mean) ** 2, 0) / rows.length;
  return [mean, Math.max(Math.sqrt(variance), 1e-6)];
}
