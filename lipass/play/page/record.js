// Records both pictures side by side, as they are shown, in the best format that the browser has.
const FORMATS = ["video/mp4;codecs=avc1.42E01E", "video/mp4", "video/webm"];
const WIDTH = 480;
const GAP = 8;
const DRAWN_MS = 40;

export class Recorder {
  // `done` gets the film and the ending of its name.
  constructor(pictures, done) {
    this.pictures = pictures;
    this.done = done;
    this.recorder = null;
  }

  get on() {
    return this.recorder !== null;
  }

  start() {
    const canvas = document.createElement("canvas");
    const height = Math.round((WIDTH * this.pictures[0].height) / this.pictures[0].width / 2) * 2;
    canvas.width = this.pictures.length * (WIDTH + GAP) - GAP;
    canvas.height = height;
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    const draw = () =>
      this.pictures.forEach((one, i) => context.drawImage(one, i * (WIDTH + GAP), 0, WIDTH, height));
    draw();
    const timer = setInterval(draw, DRAWN_MS);
    const mimeType = FORMATS.find((one) => MediaRecorder.isTypeSupported(one));
    const parts = [];
    this.recorder = new MediaRecorder(canvas.captureStream(1000 / DRAWN_MS), { mimeType, videoBitsPerSecond: 4e6 });
    this.recorder.addEventListener("dataavailable", ({ data }) => parts.push(data));
    this.recorder.addEventListener("stop", () => {
      clearInterval(timer);
      this.done(new Blob(parts, { type: mimeType }), mimeType.includes("mp4") ? "mp4" : "webm");
    });
    this.recorder.start();
  }

  stop() {
    this.recorder?.stop();
    this.recorder = null;
  }
}
