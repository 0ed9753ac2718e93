// Shows the frames of chunks evenly over the time until the next one comes.
const LONGEST_GAP_MS = 1500;
const EARLY_MS = 6; // half a refresh

export class Film {
  constructor(canvas, natural_ms) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.natural_ms = natural_ms;
    this.queue = [];
    this.next = 0;
    this.gap = natural_ms;
    this.arrived = 0;
    this.drawn = 0;
    const tick = (now) => {
      this.tick(now);
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }

  // `drawn` is called when the first frame is on the canvas.
  add(frames, rows, columns, pixels, drawn) {
    const now = performance.now();
    const since = now - this.arrived;
    this.arrived = now;
    this.gap = since < LONGEST_GAP_MS ? Math.max(since / frames, this.natural_ms) : this.natural_ms;
    const size = rows * columns * 3;
    // Who is late shows the newest: a picture is worth nothing when the next is there.
    while (this.queue.length > frames) this.queue.shift().drawn?.();
    for (let i = 0; i < frames; i++) {
      const picture = { rows, columns, rgb: pixels.subarray(i * size, (i + 1) * size) };
      this.queue.push({ ...picture, drawn: i ? null : drawn });
    }
  }

  tick(now) {
    if (!this.queue.length || now < this.next - EARLY_MS) return;
    const { rows, columns, rgb, drawn } = this.queue.shift();
    this.next = (now - this.next > this.gap ? now : this.next) + this.gap;
    if (this.canvas.width !== columns) this.canvas.width = columns;
    if (this.canvas.height !== rows) this.canvas.height = rows;
    const image = this.context.createImageData(columns, rows);
    for (let i = 0, j = 0; i < rgb.length; i += 3, j += 4) {
      image.data[j] = rgb[i];
      image.data[j + 1] = rgb[i + 1];
      image.data[j + 2] = rgb[i + 2];
      image.data[j + 3] = 255;
    }
    this.context.putImageData(image, 0, 0);
    this.drawn += 1;
    drawn?.();
  }
}
