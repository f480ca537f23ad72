// Images of visitors, as Python prepares them: upright, on white, and resized as Pillow does. Browsers resize
// otherwise, and vectors would depend on the browser.

const MAX_PIXELS = 64_000_000;
// Half the width of each filter, and the filter, by Pillow's number: Lanczos, bilinear, bicubic.
const FILTERS = {
  1: [3, (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0)],
  2: [1, (x) => Math.max(1 - Math.abs(x), 0)],
  3: [2, (x) => cubic(Math.abs(x), -0.5)],
};

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

function cubic(x, a) {
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? ((x - 5) * x + 8) * x * a - 4 * a : 0;
}

/** Return the weights of the pixels that each pixel of a resized line is made of. */
function lineWeights(from, to, [support, filter]) {
  const scale = from / to;
  const stretch = Math.max(scale, 1);
  return Array.from({ length: to }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(Math.trunc(center - support * stretch + 0.5), 0);
    const end = Math.min(Math.trunc(center + support * stretch + 0.5), from);
    const weights = Array.from({ length: end - first }, (_, j) => filter((first + j - center + 0.5) / stretch));
    const sum = weights.reduce((total, weight) => total + weight, 0);
    return { first, weights: weights.map((weight) => weight / sum) };
  });
}

/**
 * Resize one direction of 8-bit RGB.
 * @param lines number of lines across this direction
 * @param weights what each new pixel of a line is made of
 * @param step distance of the pixels of a line, in the data and in the result
 * @param lineStep distance of the lines, in the data and in the result
 */
function resizeLines(data, lines, weights, step, lineStep) {
  const result = new Uint8ClampedArray(lines * weights.length * 3);
  for (let line = 0; line < lines; line++) {
    for (const [pixel, { first, weights: ofPixel }] of weights.entries()) {
      for (let channel = 0; channel < 3; channel++) {
        let sum = 0;
        let from = line * lineStep[0] + first * step[0] + channel;
        for (let i = 0; i < ofPixel.length; i++, from += step[0]) sum += ofPixel[i] * data[from];
        result[line * lineStep[1] + pixel * step[1] + channel] = Math.floor(sum + 0.5);
      }
    }
  }
  return result;
}

export function resize({ data, width, height }, newWidth, newHeight, resample) {
  const filter = FILTERS[resample];
  if (filter === undefined) throw new Error(`resampling by ${resample} is not known`);
  const [row, newRow] = [3 * width, 3 * newWidth];
  let pixels = data;
  if (newWidth !== width) {
    pixels = resizeLines(pixels, height, lineWeights(width, newWidth, filter), [3, 3], [row, newRow]);
  }
  if (newHeight !== height) {
    pixels = resizeLines(pixels, newWidth, lineWeights(height, newHeight, filter), [newRow, newRow], [3, 3]);
  }
  return pixels;
}

/** Return an image as transformers.js takes it, in RGB; it resizes itself as above. */
export async function decode(blob, RawImage) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  } catch {
    throw new Error("it cannot be read as an image");
  }
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) throw new Error(`it has ${width} x ${height} pixels, more than 64,000,000`);
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const { data } = context.getImageData(0, 0, width, height);
  const rgb = new Uint8ClampedArray(width * height * 3);
  for (let from = 0, to = 0; from < data.length; from++) if (from % 4 !== 3) rgb[to++] = data[from];
  return asRawImage(rgb, width, height, RawImage);
}

function asRawImage(rgb, width, height, RawImage) {
  const image = new RawImage(rgb, width, height, 3);
  image.resize = async (newWidth, newHeight, { resample = 2 } = {}) =>
    asRawImage(resize({ data: rgb, width, height }, newWidth, newHeight, resample), newWidth, newHeight, RawImage);
  image.center_crop = async (newWidth, newHeight) => {
    const [left, top] = [Math.floor((width - newWidth) / 2), Math.floor((height - newHeight) / 2)];
    if (left < 0 || top < 0) throw new Error("it is smaller than the part of it that is embedded");
    const cropped = new Uint8ClampedArray(newWidth * newHeight * 3);
    for (let y = 0; y < newHeight; y++) {
      const start = ((top + y) * width + left) * 3;
      cropped.set(rgb.subarray(start, start + newWidth * 3), y * newWidth * 3);
    }
    return asRawImage(cropped, newWidth, newHeight, RawImage);
  };
  return image;
}
