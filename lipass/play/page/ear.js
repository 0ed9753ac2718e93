// Runs beside the page: takes what a microphone gives, and hands on 16 bit samples at 16 kHz.
const RATE = 16000;
const SENT = 1600;

class Ear extends AudioWorkletProcessor {
  constructor() {
    super();
    this.step = sampleRate / RATE;
    this.sum = this.weight = this.count = 0;
    this.out = new Int16Array(SENT);
  }

  process([[channel]]) {
    for (const sample of channel ?? []) {
      // The mean of what comes between two samples keeps high tones from folding down.
      this.sum += sample;
      this.weight += 1;
      if (this.weight < this.step) continue;
      const mean = this.sum / this.weight;
      this.sum = 0;
      this.weight -= this.step;
      if (this.weight > 0.999) this.weight = 0;
      this.out[this.count++] = Math.max(-1, Math.min(1, mean)) * 32767;
      if (this.count < SENT) continue;
      this.port.postMessage(this.out.slice().buffer);
      this.count = 0;
    }
    return true;
  }
}

registerProcessor("ear", Ear);
