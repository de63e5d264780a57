// Images, drawn at the resolution of the model.

const WHITE = [255, 255, 255];
const FOR_AND_AGAINST = [[190, 18, 45], [24, 84, 190]];
const A_AND_B = [[196, 88, 6], [84, 48, 152]]; // orange and purple can be told apart with every kind of color vision
const OVERLAY = 0.9; // opacity of the strongest contributions over the photo

/** Position in a diverging scale from -1 to 1 as a color; white is 0. */
function diverging(t, [positive, negative]) {
  const end = t < 0 ? negative : positive, strength = Math.min(1, Math.abs(t));
  return WHITE.map((white, c) => white + (end[c] - white) * strength);
}

/** A picture from a function of the pixel's index that returns [r, g, b] or [r, g, b, opacity]. */
function paint(canvas, colorAt) {
  const picture = new ImageData(width, height);
  for (let i = 0; i < width * height; i++) {
    const [r, g, b, opacity = 255] = colorAt(i);
    picture.data.set([r, g, b, opacity], 4 * i);
  }
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

const photoAt = (i) => page.photo.subarray(4 * i, 4 * i + 3);
const colorOf = (one, i) => one.color.subarray(4 * i, 4 * i + 3);
const rowOf = (one) => (i) => [...colorOf(one, i), one.opacity[4 * i]];

function overlayOf(mapColor, strengthAt) {
  return (i) => {
    const [r, g, b] = photoAt(i), gray = 127.5 + (r + g + b) / 6, strength = OVERLAY * strengthAt(i);
    return mapColor(i).map((value) => gray * (1 - strength) + value * strength);
  };
}

/** The images: title, name of the file, colors, and the note below. */
function views() {
  const { cells, full } = current, ends = isContrast() ? A_AND_B : FOR_AND_AGAINST;
  const mapColor = (i) => diverging(cells[cellAt(i)] / full, ends);
  const overlay = overlayOf(mapColor, (i) => Math.min(1, Math.abs(cells[cellAt(i)]) / full));
  const rows = shownClasses().map((one) => ({
    title: isContrast() ? `For ${one.name}` : "Explanation", file: `explanation ${one.name}`, colors: rowOf(one),
    below: "Pixels that contribute, in the colors of their weights",
  }));
  const file = shownClasses().map((one) => one.name).join(" not ");
  return [
    { title: "Photo", file: "photo", colors: photoAt, below: `${width} × ${height}, the input of the model` },
    ...rows,
    {
      title: isContrast() ? "Difference" : "Contributions", file: `contributions ${file}`, colors: mapColor,
      below: legend(full, ends),
    },
    { title: "Overlay", file: `overlay ${file}`, colors: overlay, below: "Contributions over the photo" },
  ];
}

function legend(full, ends) {
  const bar = element("div", "legend"), limit = full.toPrecision(2);
  const colors = [-1, 0, 1].map((t) => `rgb(${diverging(t, ends).join(" ")})`);
  bar.style.background = `linear-gradient(to right, ${colors.join(", ")})`;
  const meaning = isContrast() ? [`for ${againstClass().name}`, `for ${targetClass().name}`] : ["against", "for"];
  const group = element("div");
  group.append(bar, ticks([`−${limit}`, "0 logits", `+${limit}`]), ticks(meaning));
  return group;
}

function ticks(texts) {
  const line = element("div", "ticks");
  line.append(...texts.map((text) => element("span", "", text)));
  return line;
}

function download(canvas, name) {
  const file = `${page.title} ${name}`.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "");
  canvas.toBlob((blob) => {
    const link = Object.assign(element("a"), { href: URL.createObjectURL(blob), download: `${file}.png` });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}

/** The bytes of a PNG, red, green, blue and opacity of each pixel; gray pictures have them all in red. */
async function decode(address) {
  const image = new Image();
  image.src = address;
  await image.decode();
  const context = Object.assign(element("canvas"), { width, height }).getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, width, height).data;
}
