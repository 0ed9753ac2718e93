"""Speech for tests, from espeak-ng, as a microphone would send it."""

import ctypes
import functools

import espeakng_loader
import numpy as np

RATE = 16_000
_SPEED, _SYNCHRONOUS, _UTF8 = 1, 2, 1


@functools.cache
def _library():
    library, parts = ctypes.CDLL(espeakng_loader.get_library_path()), []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def heard(samples, count, events):
        if count > 0:
            parts.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    data = espeakng_loader.get_data_path().encode()
    rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data, 0)
    assert rate > 0
    library.espeak_SetSynthCallback(heard)
    return library, parts, rate, heard


def speech(text, voice="en-us", words_a_minute=140):
    """Say a text: `[samples]` int16 at 16 kHz, half a second of silence around it."""
    library, parts, rate, _ = _library()
    parts.clear()
    assert library.espeak_SetVoiceByName(voice.encode()) == 0
    library.espeak_SetParameter(_SPEED, words_a_minute, 0)
    told = text.encode()
    library.espeak_Synth(told, len(told) + 1, 0, 0, 0, _UTF8, None, None)
    said = np.concatenate(parts).astype(np.float64)
    count = len(said) * RATE // rate
    said = np.fft.irfft(np.fft.rfft(said)[: count // 2 + 1], count) * (count / len(said))
    silence = np.zeros(RATE // 2)
    return np.concatenate([silence, np.clip(said, -32768, 32767), silence]).astype("<i2")
