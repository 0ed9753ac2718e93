// Sends what the microphone hears to the server, while it is switched on.
export class Voice {
  // `send` gets buffers of 16 bit samples at 16 kHz.
  constructor(send) {
    this.send = send;
    this.context = null;
    this.stream = null;
  }

  get on() {
    return this.context !== null;
  }

  async start() {
    this.stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1 } });
    this.context = new AudioContext();
    await this.context.audioWorklet.addModule("ear.js");
    const ear = new AudioWorkletNode(this.context, "ear", { numberOfOutputs: 0 });
    ear.port.onmessage = ({ data }) => this.send(data);
    this.context.createMediaStreamSource(this.stream).connect(ear);
    await this.context.resume();
  }

  stop() {
    for (const track of this.stream?.getTracks() ?? []) track.stop();
    this.context?.close();
    this.context = this.stream = null;
  }
}
