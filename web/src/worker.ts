/** The program of the worker: everything that takes more than a frame. */

import { serve, type Port } from "./engine.js";

serve(self as unknown as Port);
